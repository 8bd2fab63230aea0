"""normwise within the frameworks that people train with: one file each, loaded where it is used."""
