"""A finished bundle in the form in which it is served or shipped."""
