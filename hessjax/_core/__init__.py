"""Types, tree algebra, packing, counts and messages: what every package stands on."""
