"""The pages: a module each, with page(), and perhaps prepare(), which works out ahead what its first view needs."""

from __future__ import annotations

# The modules by their names, with their titles, in the order of the menu. None is imported before it is shown.
TITLES = {
    "explore": "Explore",
    "measured": "Predicted versus measured",
    "tuning": "Tuning",
    "hardware": "Hardware",
    "export": "Export",
}
