"""The same script as a client: three lines more (1, 2, 3), the loop as long as the coordinator asks, one site's images.

python examples/training_script/after.py ADDRESS SITE SITES
"""

import sys

import torch
from torch import nn

import fedge.client
from fedge.client.data import load

address, site, sites = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = load("fashion-mnist")
x = torch.from_numpy(data.x_train / 255.0).float()[site::sites]
y = torch.from_numpy(data.y_train.copy())[site::sites]
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

session = fedge.client.connect(address, f"site-{site}", examples=len(x), layout=model)  # 1
while (task := session.receive(model)) is not None:  # 2: the newest global model is in `model`
    for _ in range(task.steps):
        batch = torch.randint(len(x), (32,))
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    session.send(model, metrics={"loss": loss.item()})  # 3

print(f"site-{site}: loss {loss.item():.3f}; the run ended: {session.finished}")
