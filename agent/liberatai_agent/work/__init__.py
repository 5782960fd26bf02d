"""Work for other processes: training, and answers with the newest model."""
