"""One file per family; `decoder.py` and `tasks.py` hold what families share."""
