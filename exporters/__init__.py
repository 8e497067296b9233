"""Lower a program to engines and a script, and write the bundle."""
