"""`milepost up`: all services of one run on this machine, as children that are owned from start to end."""
