"""One engine a file: a module here that defines a subclass of Engine is an engine, and nothing else registers it."""
