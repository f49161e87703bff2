"""One file per method. Each defines ``METHOD``; a module whose name starts with an underscore is no method."""
