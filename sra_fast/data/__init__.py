"""Reading data sets: image folders, packed sets and the public layout, and the batches of a run read from them."""
