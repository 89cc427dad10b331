"""What a server checks of a Hello, before anything is made by it."""
