"""Work with the stock tools: our primary with xl as the receiver, xl's primary with our receiver."""
