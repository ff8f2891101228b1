"""Update rules by optimizer family: one module each, with the rules, their descriptions and recipes by class name."""
