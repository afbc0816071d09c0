"""Features of a whole data set in files, and the search of them by texts and pictures."""
