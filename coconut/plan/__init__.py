"""What a run will do, before it does it: sizes, memory and time, nothing built."""
