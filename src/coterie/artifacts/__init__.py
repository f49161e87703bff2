"""What a finished run is used for: its clients' models answer rows, are evaluated and leave as files of other tools."""
