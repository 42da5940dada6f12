from swarmkit.cli import main

main()
