"""From run directories to figures, tables and one self-contained page. Imports no torch: it works on a laptop."""
