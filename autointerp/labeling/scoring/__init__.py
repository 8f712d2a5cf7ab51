"""What the scorers share: the examples they ask about, their intervals, and when to stop buying."""
