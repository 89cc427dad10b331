"""Many runs as one resumable queue, and the tables and figures of them."""
