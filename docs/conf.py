"""Settings of the documentation; `make docs` builds it with warnings as errors."""

import re

import sknbln

project = "sknbln"
author = "The sknbln developers"
copyright = author
version = release = sknbln.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"  # the docstrings say the types
numpydoc_show_class_members = False  # the template lists them
add_module_names = False

html_theme = "pydata_sphinx_theme"
html_title = f"sknbln {version}"
html_show_sourcelink = False
html_theme_options = {"show_prev_next": True, "navigation_with_keys": False}


sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_",
    "within_subsection_order": "ExampleTitleSortKey",
    "abort_on_example_error": True,
    "image_srcset": ["2x"],
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1,
}


def plain_links(app, what, name, obj, options, lines):
    """Links of scikit-learn's docstrings (of ``set_fit_request`` and its like) lead to its own pages."""
    guide = "https://scikit-learn.org/stable/metadata_routing.html"
    for i, line in enumerate(lines):
        line = re.sub(r":ref:`([^<`]*) <metadata_routing>`", rf"`\1 <{guide}>`__", line)
        lines[i] = re.sub(r":term:`([^<`]*)(?: <[^>]*>)?`", r"\1", line)


def setup(app):
    """Register the hook with Sphinx."""
    app.connect("autodoc-process-docstring", plain_links)
