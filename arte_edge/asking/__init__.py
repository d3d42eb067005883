"""How a student is asked, from its training to the device: instruction, answer form, chat template, grammar."""
