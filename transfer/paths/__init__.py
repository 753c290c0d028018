"""The data paths between service and client, both ends of each in one file."""
