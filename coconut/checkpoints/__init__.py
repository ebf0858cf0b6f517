"""Directories that hold a model: layout, headers, hub, architectures, adapters, where one is."""
