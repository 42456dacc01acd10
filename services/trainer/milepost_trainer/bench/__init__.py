"""`milepost trainer bench`: how fast this trainer is here, beside a plain loop over the same sequences."""
