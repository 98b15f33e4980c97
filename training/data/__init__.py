"""Images with labels: from folders, archives and downloads to arrays, and from arrays to the batches of an epoch.

`trees`, `cifar` and `fetch` read what lies there, `listing` says which image has which label and is in which split,
`arrays` decodes and caches, `cards` describes, `augment` and `balance` are what an epoch does to it. Knows no network.
"""
