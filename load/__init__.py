"""Load: many simulated agents against a real local cluster, and what that costs its services.

A simulated agent is the real agent, `client_agent.agent.Agent`, with its own identity, connections, state folder,
encryption and decryption; only its learner is a stand-in that trains nothing. Many share a process and its one worker
thread.
"""
