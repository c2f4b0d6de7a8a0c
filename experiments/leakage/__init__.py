"""What an upload gives away: pictures reconstructed from whole, masked, compressed, noised and summed uploads."""
