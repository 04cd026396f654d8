"""Small helpers that know nothing of models or training: files, lists in sentences, assignment by size."""
