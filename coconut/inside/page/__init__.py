"""The page of an inspection: one file that opens from disk, or served with a question box."""
