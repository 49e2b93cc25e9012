"""What lies in the data folder for people to work on: datasets, folders that are edited, captioners."""
