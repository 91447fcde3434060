"""From numbers to what people read: tables, figures, words and the page."""
