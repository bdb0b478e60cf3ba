"""The one reader of traced programs: which leaf enters which operation along which axis."""
