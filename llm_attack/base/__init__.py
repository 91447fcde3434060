"""What every part may use: errors, declared settings, files, the look of figures."""
