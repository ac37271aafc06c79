"""Sphinx configuration: Markdown through MyST, the furo theme, no network. Build with `make docs`."""

project = "Socratic Trainer"
author = "The Socratic Trainer contributors"
copyright = "2026, the Socratic Trainer contributors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = project
html_copy_source = False
html_show_sourcelink = False
myst_heading_anchors = 3  # the anchors that GitHub gives, so that one link works in both places
nitpicky = True
