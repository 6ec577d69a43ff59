"""One file per family; `decoder.py` and `tasks/` hold what families share."""
