"""The Lua scripts, one file each: every change of a job's state is one of them."""
