"""What the package makes itself: pictures, captions, sentences, voices; functions of integers."""
