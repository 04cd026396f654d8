"""From files on disk or in an object store to records."""
