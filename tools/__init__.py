"""Programs for work on swarmkit itself. Run them in the repository: `python -m tools.settings_page`."""
