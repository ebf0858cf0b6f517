"""Generated tasks that tell what thoughts compute: one file a task."""
