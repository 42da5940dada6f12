/* NVIDIA's management library with one GPU, which tells what the file named by PRETENDED_GPU says: lines of a
   name and a number. What is set is written to a file beside it, whose name ends with .limit. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };

typedef struct { unsigned pid; unsigned long long memory; unsigned instance, compute; } Process;
typedef struct { unsigned pid; unsigned long long at; unsigned sm, memory, encoder, decoder; } Sample;
typedef struct { unsigned gpu, memory; } Rates;
typedef struct { unsigned long long total, free, used; } Memory;

static long said(const char *name, long otherwise) {
    const char *path = getenv("PRETENDED_GPU");
    FILE *file = path ? fopen(path, "r") : NULL;
    char key[32];
    long value, found = otherwise;
    if (!file) return otherwise;
    while (fscanf(file, "%31s %ld", key, &value) == 2)
        if (!strcmp(key, name)) found = value;
    fclose(file);
    return found;
}

int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
int nvmlInit_v2(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return "pretended"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = (void *)1;
    return index == 0 ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetName(void *device, char *name, unsigned size) {
    snprintf(name, size, "Pretended GPU");
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
    memory->total = 8ull << 30, memory->free = 6ull << 30, memory->used = 2ull << 30;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
    *celsius = said("celsius", 40);
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
    *milliwatts = 1000 * said("watts", 50);
    return SUCCESS;
}

int nvmlDeviceGetPowerManagementDefaultLimit(void *device, unsigned *milliwatts) {
    *milliwatts = 300000;
    return SUCCESS;
}

int nvmlDeviceGetPowerManagementLimitConstraints(void *device, unsigned *low, unsigned *high) {
    *low = 100000, *high = 350000;
    return SUCCESS;
}

int nvmlDeviceSetPowerManagementLimit(void *device, unsigned milliwatts) {
    char path[4096];
    if (said("administrators_only", 0)) return NO_PERMISSION;
    snprintf(path, sizeof path, "%s.limit", getenv("PRETENDED_GPU"));
    FILE *file = fopen(path, "w");
    if (!file) return NOT_SUPPORTED;
    fprintf(file, "%u", milliwatts / 1000);
    fclose(file);
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, Process *processes) {
    long others = said("other_pid", 0), own = said("own_pid", 0), have = (others > 0) + (own > 0);
    if (said("processes_unknown", 0)) return NOT_SUPPORTED;
    if (have > *count) { *count = have; return INSUFFICIENT_SIZE; }
    *count = 0;
    if (others > 0) processes[(*count)++] = (Process){.pid = others};
    if (own > 0) processes[(*count)++] = (Process){.pid = own};
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *device, Rates *rates) {
    rates->gpu = said("load", 0), rates->memory = 0;
    return SUCCESS;
}

int nvmlDeviceGetProcessUtilization(void *device, Sample *samples, unsigned *count, unsigned long long since) {
    long own = said("own_pid", 0);
    if (said("processes_unknown", 0)) return NOT_SUPPORTED;
    if (own == 0) return NOT_FOUND;
    if (*count == 0) { *count = 1; return INSUFFICIENT_SIZE; }
    samples[0] = (Sample){.pid = own, .sm = said("own_load", 0)};
    *count = 1;
    return SUCCESS;
}
