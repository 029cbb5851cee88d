"""A plain PyTorch training script: one site, its own images, nobody else's.

python examples/training_script/before.py
"""

import torch
from torch import nn

from fedge.client.data import load

data = load("fashion-mnist")  # any images and labels would do; these come with the package
x = torch.from_numpy(data.x_train / 255.0).float()
y = torch.from_numpy(data.y_train.copy())
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

for _ in range(200):
    batch = torch.randint(len(x), (32,))
    loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print(f"loss {loss.item():.3f}")
