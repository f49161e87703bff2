"""One file or folder per method; each defines ``METHOD``. ``base`` and ``parts`` are what they share."""
