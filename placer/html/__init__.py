"""Pages: a report or a comparison as one HTML file that opens from an attachment, without a network.

Everything a page shows stands in one JSON block in it, and every number names its place there (``data-path``).
"""

from __future__ import annotations

from placer.html.comparison_page import comparison_page as comparison_page
from placer.html.rendering import require as require
from placer.html.report_page import Page as Page
from placer.html.report_page import page as page
