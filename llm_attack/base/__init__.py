"""Code that every part may use: errors, declared settings, files, the style of figures."""
