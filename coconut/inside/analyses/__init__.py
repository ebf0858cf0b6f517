"""The analyses of what thoughts do over a data set: one file each, measure, table and picture."""
