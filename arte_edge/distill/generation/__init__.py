"""What the teacher generates: questions and rationales, validated and labelled."""
