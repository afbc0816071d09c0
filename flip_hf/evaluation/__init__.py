"""Models of CLIP's kind, measured: data sets, tasks, reports, pictures."""
