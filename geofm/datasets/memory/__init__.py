"""Arrays and lists of paths that the processes of a machine share."""
