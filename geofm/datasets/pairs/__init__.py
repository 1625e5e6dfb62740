"""Which files of several sensors show the same ground, and reading them on one grid."""
