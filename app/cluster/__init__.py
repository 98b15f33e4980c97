"""Front processes and engine processes: the same service, with the sessions in processes of their own."""
