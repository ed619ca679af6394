"""What is concluded from the answers, question by question. May import what `lab/judge` may."""
